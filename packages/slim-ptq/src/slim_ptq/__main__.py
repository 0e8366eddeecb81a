"""``python -m slim_ptq``: the same as the ``slim-ptq`` command."""

from slim_ptq.cli import main

if __name__ == "__main__":
    main()
