"""Datasets: CIFAR-10 and FMoW in their own files, digits, and whatever arrays a user brings."""
