"""The network: one decoder that a spec describes. A family's file only fills the spec."""
