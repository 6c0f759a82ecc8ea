"""Runs the command."""

from scaledtrain.baselines.command import main

if __name__ == "__main__":
    main()
