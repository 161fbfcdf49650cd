"""``python -m nuclei3d`` and the command ``nuclei3d``."""

import sys


def main() -> None:
    """Run the command line; Ctrl-C is one line even while it is being imported."""
    try:
        from nuclei3d.cli import main as run
    except KeyboardInterrupt:
        sys.stderr.write("nuclei3d: stopped before it began\n")
        sys.exit(130)
    run()


if __name__ == "__main__":
    main()
