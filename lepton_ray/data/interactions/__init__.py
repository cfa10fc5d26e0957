"""Who rated or took what: ratings to predict, or items to rank."""
