from gspn_jax.evaluate import main

main()
