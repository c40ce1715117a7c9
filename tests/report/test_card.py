from __future__ import annotations

from dataclasses import replace

import yaml

from packlight.evidence import Measurement
from packlight.report.card import model_card

RECIPE = "steps:\n- method: rtn\n  bits: 4\n"
LEDGER = [
    Measurement("disk_bytes", 84_000_000, "bytes", "packed"),
    Measurement("peak_bytes", 123_000_000, "bytes", "packed", predicted=120_000_000),
    Measurement("perplexity", 23.25, "1", "packed", spread=0.5),
    Measurement("decode_tps", 77.7, "tokens/s", "packed"),
]


def test_card_holds_front_matter_recipe_numbers_and_how_to_load() -> None:
    card = model_card("some/model", LEDGER, RECIPE)
    assert yaml.safe_load(card.split("---\n")[1]) == {
        "library_name": "transformers",
        "pipeline_tag": "text-generation",
        "tags": ["packlight"],
    }
    assert f"```yaml\n{RECIPE}```\n" in card
    for part in ("# some/model", "84 MB", "23.25 ± 0.5", "AutoModelForCausalLM.from_pretrained", "`evidence.jsonl`"):
        assert part in card


def test_card_is_the_same_whatever_the_run_took() -> None:
    slower = [
        replace(row, value=1, predicted=2, command="again") if row.name in ("peak_bytes", "decode_tps") else row
        for row in LEDGER
    ]
    card = model_card("m", LEDGER, RECIPE)
    assert card == model_card("m", slower, RECIPE)
    assert "77.7" not in card
    assert "123 MB" not in card


def test_a_recipe_cannot_end_its_own_fence() -> None:
    card = model_card("m", LEDGER, "note: '```` and {braces}'\n")
    assert "`````yaml\nnote: '```` and {braces}'\n`````\n" in card
