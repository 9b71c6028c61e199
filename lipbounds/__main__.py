"""``python -m lipbounds`` is the command ``lipbounds``."""

from lipbounds._cli.main import main

if __name__ == "__main__":
    main()
