"""How well predicted nuclei match true ones."""
