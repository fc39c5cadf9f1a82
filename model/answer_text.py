"""Reading an answer's text: where its groups stand and which words name them."""

import re

SEG_MARKER = "{seg}"

_CLOSING = ".,;:!?)]}"
_SPACE_BEFORE_CLOSING = re.compile(rf"[ \t]+(?=[{re.escape(_CLOSING)}]+(?:\s|$|{re.escape(SEG_MARKER)}))")
_LEFT_OVER_COMMA = re.compile(r"[,;:]\s*(?=[.!?])")
# A sentence or list mark ends a phrase only where a space follows: not in 3.5 or 10:30.
_PHRASE_BREAK = re.compile(r"[.!?;:,](?:\s+|$)|\n+")
# Words that lead to a name without being part of it.
_LEAD = re.compile(
    r"^(?:and|or|also|then|plus|as well as|sure|yes"
    r"|(?:it|this|that|here|there|they|these|those|we have|you can see)(?:['’](?:s|re)|\s+is|\s+are)?(?:\s+also)?)\s+(?=\S)",
    re.IGNORECASE,
)
_COPULA = re.compile(r"^(?:it|this|that|here|there|they|these|those)(?:['’](?:s|re)|\s+is|\s+are)\s+", re.IGNORECASE)
