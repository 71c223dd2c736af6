"""The simulator: real engines, schedulers, page tables and routers over a measured cost of a step. No tensors, no model."""
