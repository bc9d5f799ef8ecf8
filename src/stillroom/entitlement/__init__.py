"""May one learn from this teacher? Terms, verdict, obligations; no I/O."""

from stillroom.entitlement.terms import TermsStatement, licence_id
from stillroom.entitlement.verdict import Reason, Verdict, decide, require

__all__ = ["Reason", "TermsStatement", "Verdict", "decide", "licence_id", "require"]
