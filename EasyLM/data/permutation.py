"""Pseudo-random permutations of any range, computed element by element in constant memory."""

# Rounds of the Feistel network. With a random round function, 4 rounds give a pseudo-random permutation (Luby and
# Rackoff, 1988).
_ROUNDS = 6
_MASK64 = (1 << 64) - 1


def permuted(position: int, count: int, seed: int, epoch: int) -> int:
    """Returns the number at a position of the permutation of 0..count-1 that (seed, epoch) selects.

    A Feistel network permutes a range of 4^k >= count numbers. A number outside 0..count-1 is permuted again until it
    is inside ("cycle walking", Black and Rogaway, 2002). The permutation is not cryptographic, but passes tests of
    uniformity.
    """
    half_bits = max(3, ((count - 1).bit_length() + 1) // 2)  # at least 3: tiny networks reach few permutations
    low_mask = (1 << half_bits) - 1
    key = _mix_bits(_mix_bits(seed) + epoch)
    number = position
    while True:
        left, right = number >> half_bits, number & low_mask
        for i in range(_ROUNDS):
            left, right = right, left ^ (_mix_bits(key + (i << half_bits) + right) & low_mask)
        number = (left << half_bits) | right
        if number < count:
            return number


def shuffled_number(row: int, count: int, seed: int) -> int:
    """Returns element `row` of an endless sequence of epochs. Each epoch is a new permutation of 0..count-1."""
    epoch, position = divmod(row, count)
    return permuted(position, count, seed, epoch)


def _mix_bits(value: int) -> int:
    """Spreads every bit of a number over 64 bits (SplitMix64: Steele, Lea, Flood, 2014)."""
    value = (value * 0x9E3779B97F4A7C15 + 0x9E3779B97F4A7C15) & _MASK64
    value = ((value ^ (value >> 30)) * 0xBF58476D1CE4E5B9) & _MASK64
    value = ((value ^ (value >> 27)) * 0x94D049BB133111EB) & _MASK64
    return value ^ (value >> 31)
