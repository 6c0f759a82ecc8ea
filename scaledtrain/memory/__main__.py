"""Runs the command."""

from scaledtrain.memory.command import main

if __name__ == "__main__":
    main()
