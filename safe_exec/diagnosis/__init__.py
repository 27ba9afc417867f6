"""From evidence to a verdict: pure rules, and the document that holds their answer."""
