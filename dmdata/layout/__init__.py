"""Where the elements of an array lie in an object: headers of .npy, .npz, .pt and .safetensors, selections, read plans.

Everything here is pure: bytes of a header in, byte ranges out. Nothing is unpickled and nothing is fetched.
"""
