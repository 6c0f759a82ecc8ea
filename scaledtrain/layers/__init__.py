"""What goes on inside a model while it trains: gradients, updates and activations, by layer."""

from scaledtrain.layers.layer_watch import LayerWatch

__all__ = ["LayerWatch"]
