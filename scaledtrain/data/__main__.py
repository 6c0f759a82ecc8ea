"""``python -m scaledtrain.data``."""

from __future__ import annotations

from scaledtrain.data.commands import main

if __name__ == "__main__":
    main()
