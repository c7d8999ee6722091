"""Many models at once: their products on every core, the fastest way on a device, and how often they are right."""
