"""``python -m scaledtrain.tune``."""

from scaledtrain.tune.command import main

if __name__ == "__main__":
    main()
