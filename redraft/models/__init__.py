"""What is the network? One decoder driven by a spec; a family file only fills the spec."""
