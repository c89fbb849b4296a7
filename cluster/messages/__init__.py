"""Messages between driver, ranks and controller: msgspec structs, encoded and decoded here."""
