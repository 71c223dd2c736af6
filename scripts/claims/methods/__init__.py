"""Claims by family of methods. Each module has CLAIMS. No module imports a method, so that a method can be deleted."""
