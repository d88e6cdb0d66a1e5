"""Captions of six clips, with what real ones have: several references, clitics, punctuation, an empty hypothesis."""

REFERENCES = [
    ["A dog barks loudly, twice.", "A large dog is barking", "Loud barking of a dog"],
    ["Rain falls on a tin roof", "It's raining on metal", "Heavy rain hits a roof"],
    ["A car engine starts.", "An engine is started and revs"],
    ["Birds sing in the forest", "Several birds chirp", "Bird song", "Birds chirping among trees"],
    ["A door closes", "Someone shuts a door"],
    ["A piano plays slow chords (rendered)"],
]
HYPOTHESES = [
    "A dog is barking loudly.",
    "Rain is falling on a roof",
    "an engine starts and revs",
    "Birds chirping in trees; birds sing",
    "",
    "A guitar plays",
]
