"""Runs the command."""

from scaledtrain.simulate.command import main

if __name__ == "__main__":
    main()
