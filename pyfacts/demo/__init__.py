"""The demos: how a language model stores facts (`facts`), and what neurons fire on in real text (`text`)."""
