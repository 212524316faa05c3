"""Running a LLaVA on a part of its visual tokens: sequences, decoder, attention."""
