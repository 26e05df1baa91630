"""A worker with a large lasting part and a churning one, which checks both until stdin ends.

Workers with one seed hold the same. Run it with LD_PRELOAD to try an allocator. It prints "ready"
and, at the end, "OK" with the number of rounds; anything wrong is an AssertionError.
"""

import hashlib
import random
import select
import sys

SEED, MEBIBYTES = 7, 24


def block(number: int, size: int) -> bytearray:
    """Content that follows from its number."""
    line = hashlib.sha256(b"%d" % number).digest() * 128
    return bytearray((line * (size // len(line) + 1))[:size])


def digest(data: bytes) -> bytes:
    return hashlib.blake2b(data, digest_size=16).digest()


def main() -> None:
    chance = random.Random(SEED)
    lasting = [block(n, 1 << 20) for n in range(MEBIBYTES)]
    sums = [digest(data) for data in lasting]
    words = {f"key {n}": f"value {n}" * (n % 40) for n in range(20_000)}
    churn: dict[int, bytearray] = {}
    rounds = 0
    print("ready", flush=True)
    while not select.select([sys.stdin], [], [], 0.01)[0]:
        rounds += 1
        for _ in range(40):
            number = chance.randrange(200)
            old = churn.pop(number, None)
            assert old is None or old == block(number, len(old)), f"block {number}"
            churn[number] = block(number, chance.choice([64, 700, 5000, 70_000, 400_000]))
        which = rounds % MEBIBYTES
        assert digest(lasting[which]) == sums[which], f"lasting block {which}"
        place = chance.randrange(1 << 20)
        lasting[which][place] ^= 255
        lasting[which][place] ^= 255
        number = chance.randrange(20_000)
        assert words[f"key {number}"] == f"value {number}" * (number % 40)
    assert [digest(data) for data in lasting] == sums
    print("OK", rounds, flush=True)


main()
