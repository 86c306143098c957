"""The profile as a table: what each choice alone does to each part of a model."""

from __future__ import annotations

from rich.table import Table

from autocompress.agent.profile import Profile


def sensitivity_table(profile: Profile, title: str) -> Table:
    """One row a site and dimension: its choices, each with the rise of the output distance, in nats."""
    table = Table(title=title, title_justify="left")
    table.add_column("site", no_wrap=True)
    table.add_column("dimension", no_wrap=True)
    table.add_column("choice: change of the outputs by it alone")
    for key, dimension in profile.dimensions.items():
        known = profile.effects.get(key, {})
        told = [f"{choice}: {_short(known[str(choice)])}" for choice in dimension.choices if str(choice) in known]
        if told:
            table.add_row(dimension.site, dimension.name, "   ".join(told))
    return table


def _short(effect: float) -> str:
    return "0" if effect == 0 else f"{effect:.1e}" if effect < 1e-3 else f"{effect:.3f}"
