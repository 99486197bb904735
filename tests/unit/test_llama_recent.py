"""When the rates of late are announced."""

from meshd_plugins.builtin.llama.running.recent import LASTING_S, RecentRates, rates_in


def test_a_slower_device_is_announced_once_it_lasts() -> None:
    rates = RecentRates((100.0, 10.0))
    assert not rates.seen((100.0, 7.0), 0.0)
    assert not rates.seen((100.0, 7.0), LASTING_S - 1)
    assert rates.seen((100.0, 7.0), LASTING_S)
    assert not rates.seen((100.0, 7.0), 10 * LASTING_S), "that is what is announced now"
    assert not rates.seen((100.0, 10.0), 11 * LASTING_S)
    assert rates.seen((100.0, 10.0), 12 * LASTING_S), "it has cooled down"


def test_a_dip_and_a_small_difference_are_nobodys_business() -> None:
    rates = RecentRates((100.0, 10.0))
    for second in range(10):
        assert not rates.seen((100.0, 2.0), second * LASTING_S)
        assert not rates.seen((100.0, 10.0), (second + 0.9) * LASTING_S)
    assert not rates.seen((120.0, 8.0), 1000.0)
    assert not rates.seen((120.0, 8.0), 2000.0)
    assert not rates.seen((0.0, 0.0), 3000.0), "nothing is known"
    assert not rates.seen((0.0, 0.0), 4000.0)


def test_what_makes_no_sense_is_nothing() -> None:
    assert rates_in({"prefill_tokens_per_s": 1, "decode_tokens_per_s": 2.5}) == (1.0, 2.5)
    assert rates_in({"prefill_tokens_per_s": True, "decode_tokens_per_s": -1}) == (0.0, 0.0)
    assert rates_in({"prefill_tokens_per_s": float("nan"), "decode_tokens_per_s": "9"}) == (
        0.0,
        0.0,
    )
