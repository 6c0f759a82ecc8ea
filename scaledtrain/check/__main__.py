"""``python -m scaledtrain.check``."""

from scaledtrain.check.command import main

if __name__ == "__main__":
    main()
