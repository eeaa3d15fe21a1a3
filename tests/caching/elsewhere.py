"""What another process finds, with other addresses, and other hashes of texts: it is this module that runs there."""

from fuseplan.caching.content import content_of
from fuseplan.providers import BUILT_IN_PROVIDERS, device_profile
from fuseplan.rules.families import BUILT_IN_RULES
from tests.forks import Forks, Request

TEXT = "hashed here and there"


def elsewhere(forks: Forks) -> list[str]:
    """The key of a manager, then keys of pairs of values, a line each."""
    (outcome,) = forks.outcomes(forks.start(Request(module=__name__)))
    assert outcome.status == 0, outcome.output
    hashed, *lines = outcome.output.splitlines()
    assert hashed != str(hash(TEXT))
    return lines


def main() -> None:
    from tests.caching.test_content import pairs
    from tests.caching.test_keys import external, key, own, pass_that_adds, provider

    print(hash(TEXT))
    print(
        key(
            rules=[own(), *BUILT_IN_RULES[::-1]], providers=[provider(), *BUILT_IN_PROVIDERS[::-1]],
            passes=[external(uuid="1"), pass_that_adds(1, uuid="1")], device=device_profile("h200"),
        )
    )  # fmt: skip
    for left, right in pairs():
        print(content_of(left).key, content_of(right).key)


if __name__ == "__main__":
    main()
