"""Several sources as one: weights from a flag, whole numbers in their proportion, and whose turn it is at each row."""

from EasyLM.errors import UserError


def parse_numbers(name: str, text: str, count: int, kind: type = float) -> list:
    """The numbers of a flag's comma list, one for each of `count` sources.

    Raises:
      UserError: naming the flag, if they are not numbers, not so many, negative, or all 0.
    """
    try:
        numbers = [kind(part) for part in text.split(",")]
    except (ValueError, ZeroDivisionError):
        raise UserError(f"--{name}={text}: not a comma list of {'whole ' * (kind is int)}numbers") from None
    if len(numbers) != count:
        raise UserError(f"--{name}={text}: {len(numbers)} numbers for {count} inputs (a glob is one input)")
    if not all(0 <= number < float("inf") for number in numbers) or not any(numbers):
        raise UserError(f"--{name}={text}: each must be 0 or more, one of them more than 0")
    return numbers


def proportional(total: int, weights: list[float]) -> list[int]:
    """Whole numbers that add up to `total`, each within 1 of its share by weight (by the largest remainder)."""
    shares = [total * weight / sum(weights) for weight in weights]
    numbers = [int(share) for share in shares]
    by_remainder = sorted(range(len(weights)), key=lambda i: numbers[i] - shares[i])
    for i in by_remainder[: total - sum(numbers)]:
        numbers[i] += 1
    return numbers
