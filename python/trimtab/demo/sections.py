"""The sections of the demo, in the order of the report. A new algorithm adds its line here."""

from __future__ import annotations

from trimtab.demo import inverse_q, olora, salience, self_contrastive, speed
from trimtab.demo.section import Section

SECTIONS: dict[str, Section] = {
    section.key: section
    for section in (
        salience.SECTION,
        self_contrastive.SECTION,
        inverse_q.SECTION,
        olora.SECTION,
        speed.SECTION,
    )
}
