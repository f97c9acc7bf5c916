"""Recall arrays of one sample as a Parquet file that is complete before the journal line that names it."""

from pathlib import Path

from harness.engine import ProbeResult
from harness.files import writing_whole


def write_part(run_folder: Path, variant: str, key: str, probes: ProbeResult) -> str:
    """Write the columns of `probes` and return the file's path relative to the run folder.

    The name follows from the key: a sample that is run again after a crash replaces its own part.
    """
    import pyarrow
    import pyarrow.parquet

    name = f"recall/{variant}/part-{key}.parquet"
    table = pyarrow.table({column: list(values) for column, values in probes.columns.items()})
    table = table.replace_schema_metadata({"trajectory": probes.trajectory})
    with writing_whole(run_folder / name) as temporary:
        pyarrow.parquet.write_table(table, temporary, compression="zstd")
    return name


def read_part(run_folder: Path, name: str) -> dict[str, list[object]]:
    """The columns of one part, as written."""
    import pyarrow.parquet

    columns: dict[str, list[object]] = pyarrow.parquet.read_table(run_folder / name).to_pydict()
    return columns
