"""``python -m nuclei3d``."""

from nuclei3d.cli import main

if __name__ == "__main__":
    main()
