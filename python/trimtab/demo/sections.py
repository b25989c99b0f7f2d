"""The sections of the demo, in the order of the report. A new algorithm adds its line here."""

from __future__ import annotations

from trimtab.demo import salience, speed
from trimtab.demo.section import Section

SECTIONS: dict[str, Section] = {
    section.key: section for section in (salience.SECTION, speed.SECTION)
}
