"""Runs the command."""

from scaledtrain.replay.command import main

if __name__ == "__main__":
    main()
