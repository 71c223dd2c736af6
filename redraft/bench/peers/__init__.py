"""Engines that `redraft bench decode` lets take turns, each in a process of its own."""
