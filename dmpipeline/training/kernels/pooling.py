# mypy: allow-untyped-defs, allow-untyped-decorators
# compiled kernels take their types from what they are called with

"""Max pooling of pictures with channels last, over windows that do not overlap, and its gradient."""

from dmpipeline.compute import kernel


@kernel
def pool(pictures, pooled, winners, window):
    """Compute the largest of each window of pictures (n, height, width, channels), and which place of it that is."""
    for n in range(len(pooled)):
        for y in range(pooled.shape[1]):
            for x in range(pooled.shape[2]):
                largest, winner = pooled[n, y, x], winners[n, y, x]
                largest[:] = pictures[n, y * window, x * window]
                winner[:] = 0
                for k in range(1, window * window):
                    rival = pictures[n, y * window + k // window, x * window + k % window]
                    # without branches, which would be guessed wrong as often as not
                    for c in range(len(largest)):
                        winner[c] = k if rival[c] > largest[c] else winner[c]
                        largest[c] = max(rival[c], largest[c])


@kernel
def unpool(errors, winners, pictures, window):
    """Put the error of each window into the place of `pictures` that was its largest, and 0 into its others."""
    for n in range(len(errors)):
        for y in range(errors.shape[1]):
            for x in range(errors.shape[2]):
                error, winner = errors[n, y, x], winners[n, y, x]
                for k in range(window * window):
                    back = pictures[n, y * window + k // window, x * window + k % window]
                    for c in range(len(error)):
                        back[c] = error[c] if winner[c] == k else 0
