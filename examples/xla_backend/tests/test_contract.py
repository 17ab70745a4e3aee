from dsv4_hal.conformance.judging.results import Outcome


def test_contract(conformance_outcome: Outcome) -> None:
    """Every case of dsv4-hal's contract; the plugin fails those that disagree."""
