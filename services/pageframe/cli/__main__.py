"""The pageframe command by module name: ``python -m pageframe.cli``."""

from pageframe.cli.main import main

if __name__ == "__main__":
    main()
