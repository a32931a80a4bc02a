"""Today's stock as a table: what is read, and what is refused."""

from __future__ import annotations

import pytest
import torch

from offrl.envs.inventory.faults import NetworkError
from offrl.envs.inventory.network import Network
from offrl.envs.inventory.state import read_state, write_state


def example(unmet="lost"):
    nodes = {"depot": {"holding": 0.1}, "north": {"kind": "store", "holding": 1, "underage": 9}}
    edges = [{"from": "supplier", "to": "depot", "lead_time": 3}, {"from": "depot", "to": "north", "lead_time": 1}]
    return Network.of(nodes, edges, unmet)


def table(folder, text):
    (folder / "state.csv").write_text("node,arrives_in,quantity\n" + text)
    return folder / "state.csv"


def test_rows_are_slots_and_what_is_not_on_its_way_is_none(tmp_path):
    found = read_state(table(tmp_path, "north,0,2.5\ndepot, 2 ,7\n depot,0,4\n"), example(), 3)
    assert found.tolist() == [[[4, 0, 7], [2.5, 0, 0]]]


@pytest.mark.parametrize("items", [("",), ("red", "blue")])
def test_a_state_is_read_as_it_was_written(tmp_path, items):
    inventory = torch.rand(len(items), 2, 3).round(decimals=3)
    inventory[0, 0, 1] = 0
    write_state(tmp_path / "state.csv", inventory, example(), items)
    assert torch.equal(read_state(tmp_path / "state.csv", example(), 3, items), inventory)


def test_a_store_whose_demand_waits_may_have_less_than_nothing(tmp_path):
    path = table(tmp_path, "depot,0,1\nnorth,0,-2\n")
    assert read_state(path, example("backlog"), 3)[0, 1, 0] == -2
    with pytest.raises(NetworkError, match="state.csv: quantity: row 1 has -2 for 'north'"):
        read_state(path, example(), 3)


WHOLE = "depot,0,1\nnorth,0,1\n"


@pytest.mark.parametrize(
    ("text", "kind", "message"),
    [
        (WHOLE + "nroth,1,1\n", "state-node", "state.csv: node: row 2 is of 'nroth'; did you mean north?"),
        (WHOLE + "supplier,0,1\n", "state-node", "node: row 2 is of 'supplier'; valid: depot, north"),
        (WHOLE + "depot,1,-1\n", "state-quantity", "quantity: row 2 has -1 for 'depot'"),
        (WHOLE + "depot,1,\n", "state-quantity", "quantity: row 2 has nan for 'depot'"),
        (WHOLE + "depot,1,inf\n", "state-quantity", "quantity: row 2 has inf for 'depot'"),
        (WHOLE + "depot,3,1\ndepot,4,1\n", "state-arrival", "arrives_in: row 2 has 3 for 'depot'; valid: 0 to 2 (and 1 more)"),
        (WHOLE + "depot,0.5,1\n", "state-arrival", "arrives_in: row 2 has 0.5 for 'depot'"),
        (WHOLE + "depot,soon,1\n", "state-arrival", "arrives_in: row 2 has nan for 'depot'"),
        (WHOLE + "depot,2,1\ndepot,2,1\n", "state-twice", "node: row 3 gives 'depot' with arrives_in 2 again"),
        ("depot,0,1\nnorth,1,1\n", "state-missing", "node: no row says what 'north' has on hand"),
        ("", "state-missing", "no row says what 'depot' has on hand (and 1 more)"),
        ("depot,0\n", "unreadable", "state.csv: row 0 has 2 cells, the head 3"),
    ],
)
def test_what_is_wrong_is_named(tmp_path, text, kind, message):
    with pytest.raises(NetworkError) as error:
        read_state(table(tmp_path, text), example(), 3)
    assert message in str(error.value) and [each.name for each in error.value.findings] == [kind]


def test_columns_and_items_are_named(tmp_path):
    (tmp_path / "state.csv").write_text("node,arives_in,quantity\n")
    with pytest.raises(NetworkError, match="has no column 'arrives_in'; did you mean arives_in?"):
        read_state(tmp_path / "state.csv", example(), 3)
    with pytest.raises(NetworkError, match="has no column 'item'"):
        read_state(table(tmp_path, WHOLE), example(), 3, ("red", "blue"))
    rows = "item,node,arrives_in,quantity\nred,depot,0,1\nred,north,0,1\nblue,depot,0,1\n"
    (tmp_path / "state.csv").write_text(rows)
    with pytest.raises(NetworkError, match="no row says what 'north' has on hand of 'blue'"):
        read_state(tmp_path / "state.csv", example(), 3, ("red", "blue"))
    (tmp_path / "state.csv").write_text(rows + "blu,north,0,1\n")
    with pytest.raises(NetworkError, match="item: row 3 is of 'blu'; did you mean blue?"):
        read_state(tmp_path / "state.csv", example(), 3, ("red", "blue"))
    with pytest.raises(NetworkError, match="nothing.csv"):
        read_state(tmp_path / "nothing.csv", example(), 3)
