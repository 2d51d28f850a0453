"""docs/scaling.md: its tables are the program's, and its formulas what the code communicates."""

import dataclasses
import json

import pytest

from benchmarks import scaling

RATES = scaling.Rates()


def test_the_page_is_up_to_date():
    page = scaling.PAGE.read_text()
    assert scaling.filled(page, RATES) == page
    assert set(scaling.blocks(RATES)) == {name for _, name, *_ in scaling.MARKER.findall(page)}


def test_rates_can_be_replaced(tmp_path, capsys, monkeypatch):
    file = tmp_path / "rates.json"
    file.write_text(json.dumps({"cholesky": 4e12, "network": 9e10}))
    monkeypatch.setattr("sys.argv", ["scaling", "--rates", str(file)])
    assert scaling.main() == 0
    printed = capsys.readouterr().out
    assert "| cholesky | 4e+12 |" in printed and "| network | 9e+10 |" in printed
    file.write_text(json.dumps({"colour": 1.0}))
    with pytest.raises(TypeError, match="colour"):
        scaling.main()


@pytest.mark.parametrize("quantity", ["coding rate", "von Neumann"])
def test_costs(quantity):
    """The rule between the routes, and what each rate does."""
    at, above = (scaling.cost(8, 1024, quantity, RATES, own=n) for n in (512, 513))
    assert (at.route, above.route) == ("gather", "all-reduce")
    assert at.moved == pytest.approx(above.moved)  # where 16-bit rows are even, 4d
    assert above.products < at.products / 7  # shared among 8
    assert at.factor == above.factor
    fast = dataclasses.replace(RATES, cholesky=2e12, eigen=1e12)
    assert scaling.cost(8, 1024, quantity, fast).factor == pytest.approx(at.factor / 2)
    assert at.total == at.communication + at.products + at.factor


def test_step_of_vit_l():
    """304 million parameters see 50 tokens of an image, 25 million see 197; 6 flops each."""
    assert scaling.vit_l_flops() == pytest.approx(6 * (302e6 * 50 + 25e6 * 197), rel=0.05)
