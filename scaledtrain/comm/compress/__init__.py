"""Gradients in fewer bytes.

* A `Codec` (`FP16`, `BF16`, `TopK`, `Sign`) turns tensors into smaller ones and back; `Feedback`
  keeps what a codec left out and adds it to the next gradient.
* `compressed` wraps a `Group`, so that its sums and means are taken of encoded tensors: with any
  codec, or with `PowerSGD`, which has to look at all ranks' gradients together.
"""

from scaledtrain.comm.compress.codec import Codec
from scaledtrain.comm.compress.codecs import BF16, FP16, Sign, TopK
from scaledtrain.comm.compress.compressed import Compression, compressed
from scaledtrain.comm.compress.feedback import Feedback
from scaledtrain.comm.compress.group import CompressedGroup
from scaledtrain.comm.compress.power_sgd import PowerSGD
from scaledtrain.comm.flat import bytes_of

__all__ = [
    "BF16",
    "FP16",
    "Codec",
    "CompressedGroup",
    "Compression",
    "Feedback",
    "PowerSGD",
    "Sign",
    "TopK",
    "bytes_of",
    "compressed",
]
