"""The process group, its back ends, and the averaging of gradients."""
