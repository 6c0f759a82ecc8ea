"""Runs the command."""

from scaledtrain.evaluate.command import main

if __name__ == "__main__":
    main()
