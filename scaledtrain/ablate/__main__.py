"""``python -m scaledtrain.ablate``."""

from scaledtrain.ablate.command import main

if __name__ == "__main__":
    main()
