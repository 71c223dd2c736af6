"""Routers, which decide the worker of a request. One per file; sched/router.py defines the interface."""
