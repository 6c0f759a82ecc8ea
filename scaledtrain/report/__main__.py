"""``python -m scaledtrain.report``."""

from scaledtrain.report.command import main

if __name__ == "__main__":
    main()
