"""Merges cost tables that `fuseplan tune` wrote into those that the package has.

    PYTHONPATH=src:. python benchmarks/ship_costs.py TABLE [TABLE ...]

Of two rows of a key and size the later one stays. Only measured rows are taken, each with its command, date, versions
and topology.
"""

import argparse
from pathlib import Path

from fuseplan.errors import ConfigError
from fuseplan.planner.costs import SHIPPED, CostTable, Provenance


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("tables", nargs="+", type=Path, metavar="TABLE", help="a JSON file of one device")
    for path in parser.parse_args().tables:
        try:
            print(merged(path, SHIPPED))
        except ConfigError as error:
            parser.error(str(error))


def merged(path: Path, folder: Path) -> str:
    """Puts a table's rows into that of its device in a folder, and says how many it has then.

    Raises:
        ConfigError: it is no sound table, or a row isn't measured.
    """
    table = CostTable.load(path)
    if modelled := [row.key for row in table.rows if row.provenance is not Provenance.MEASURED]:
        raise ConfigError(f"cost table {str(path)!r}: {modelled[0]!r} isn't measured; ship measured rows alone")
    into = folder / f"{table.device}.json"
    there = CostTable.load(into, device=table.device) if into.exists() else CostTable(device=table.device)
    known = {(row.key, row.tokens): row for row in there.rows}
    later = [row for row in table.rows if (row.key, row.tokens) not in known
             or row.date >= known[row.key, row.tokens].date]  # fmt: skip
    result = there.updated(later)
    result.save(into)
    return f"{into.name}: {len(result.rows)} rows, {len(later)} from {path}"


if __name__ == "__main__":
    main()
