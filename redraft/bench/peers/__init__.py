"""The engines that `redraft bench decode` measures in turns, each in its own process."""
