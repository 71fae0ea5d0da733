"""Models: parameters and activations declared in tables, forward, and backward as its mirror."""
