"""A diff for the machines of CI: JUnit, SARIF, GitHub annotations."""

from __future__ import annotations

import json
from urllib.parse import quote
from xml.etree import ElementTree

from .model import GraphDiff
from .render_terminal import headline, places_of, verdict_line


def to_junit(diff: GraphDiff) -> str:
    """Each rule of the policy as a test case, and one for the comparison itself: it fails with the policy alone, and lists the edits."""
    failed = sum(not verdict.ok for verdict in diff.verdicts)
    suite = ElementTree.Element("testsuite", name="octavo diff", tests=str(len(diff.verdicts) + 1), failures=str(failed), errors="0")
    case = ElementTree.SubElement(suite, "testcase", classname="octavo.diff", name=_xml(f"{diff.before} → {diff.after}"))
    ElementTree.SubElement(case, "system-out").text = _xml("\n".join([headline(diff), *(edit.line for edit in diff.edits)]))
    for verdict in diff.verdicts:
        case = ElementTree.SubElement(suite, "testcase", classname="octavo.diff.policy", name=_xml(verdict.rule))
        if not verdict.ok:
            ElementTree.SubElement(case, "failure", message=_xml(verdict_line(verdict)))
    ElementTree.indent(suite)
    return ElementTree.tostring(suite, encoding="unicode", xml_declaration=True) + "\n"


def to_sarif(diff: GraphDiff, version: str) -> str:
    """SARIF 2.1.0: a violated rule is an error, an edit a note, both at the file that changed."""
    location = [{"physicalLocation": {"artifactLocation": {"uri": quote(diff.after)}}}]
    results = [
        {"ruleId": "policy", "level": "error", "message": {"text": verdict_line(v)}, "locations": location} for v in diff.verdicts if not v.ok
    ]
    results += [
        {"ruleId": edit.kind, "level": "note", "message": {"text": edit.line + (f" at {places_of(edit)}" if edit.places else "")}, "locations": location}
        for edit in diff.edits
    ]
    rules = [{"id": name} for name in dict.fromkeys(str(result["ruleId"]) for result in results)]
    driver = {"name": "octavo diff", "version": version, "rules": rules}
    document = {"$schema": "https://json.schemastore.org/sarif-2.1.0.json", "version": "2.1.0",
                "runs": [{"tool": {"driver": driver}, "results": results}]}
    return json.dumps(document, indent=1, ensure_ascii=False) + "\n"


def to_github(diff: GraphDiff) -> str:
    """Workflow commands: an error for each violated rule, a notice for each edit, at most the ten of a kind that GitHub shows."""
    file = _property(diff.after)
    lines = [f"::error file={file},title=octavo diff::{_message(verdict_line(v))}" for v in diff.verdicts if not v.ok]
    lines += [f"::notice file={file},title=octavo diff::{_message(edit.line)}" for edit in diff.edits[:10]]
    return "\n".join(lines or [f"::notice title=octavo diff::{_message(headline(diff))}"]) + "\n"


def _message(text: str) -> str:
    return text.replace("%", "%25").replace("\r", "%0D").replace("\n", "%0A")


def _property(text: str) -> str:
    return _message(text).replace(":", "%3A").replace(",", "%2C")


def _xml(text: str) -> str:
    """Without the characters that XML has no spelling for."""
    return "".join(c if c in "\t\n" or (c >= " " and not 0xD800 <= ord(c) <= 0xDFFF and c not in "\ufffe\uffff") else "?" for c in text)
